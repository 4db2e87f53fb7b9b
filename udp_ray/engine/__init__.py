"""Private training in torch and DeepSpeed: step, checkpoint, evaluation, loop. No ray."""
