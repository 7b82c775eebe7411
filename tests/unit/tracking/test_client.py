"""Passwords in addresses stay out of what people read and of file names."""

from __future__ import annotations

import mlflow
import pytest

from cellbench.errors import redact_passwords
from cellbench.tracking.client import to_error
from cellbench.tracking.store_lock import file_lock


@pytest.mark.parametrize(
    "address", ["postgresql://lab:s3cret@db:5432/mlflow", "https://lab:s3cret@mlflow.lab", "postgresql+psycopg2://lab:s3@cret@db/x"]
)
def test_a_refusal_names_the_address_without_its_password(address):
    message = str(to_error(RuntimeError(f"connection to {address} failed"), address))
    assert "cret" not in message
    assert message.count("lab:***@") == 2


def test_an_address_without_a_password_is_named_as_it_is():
    for text in ("sqlite:////home/me/mlflow.db", "http://127.0.0.1:5000", "https://mlflow.lab/api", "C:/x@y: no"):
        assert redact_passwords(text) == text


def test_the_locks_name_holds_no_password():
    place = str(file_lock("postgresql://lab:s3cret@db/mlflow").lock_file)
    assert "s3cret" not in place
    assert place != str(file_lock("postgresql://lab:s3cret@db/other").lock_file)


def test_a_server_that_is_away_is_said_to_be_and_why(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(mlflow.MlflowException) as refused:
        mlflow.MlflowClient("http://127.0.0.1:1").search_experiments()
    assert str(to_error(refused.value, "http://127.0.0.1:1")) == (
        "MLflow at http://127.0.0.1:1 does not answer (Connection refused). Start it, or set another MLFLOW_TRACKING_URI."
    )
