"""The harness: heads on frozen features, trained, validated and tested by tiles."""
