"""cellbench: which frozen foundation model, with which segmentation head, outlines your cells best, and is the difference real?

Importing the package only switches off the telemetry of the libraries behind it, which read these variables when they are imported.
"""

import os

__version__ = "0.2.0"

# Measured: MLflow looks up a host of its own and writes an installation id at its first event unless this is set before its import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow by itself would hold a call for four minutes when its server does not answer; what is told meanwhile waits in an outbox instead.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
