"""From batches to a trained model: schedule, optimizer, step, loop, checkpoints and metrics."""
