"""What a run folder holds: checkpoints and logs."""
