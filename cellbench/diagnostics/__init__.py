"""Speed, self-tests of backbones and the checks that plug-ins must pass."""
