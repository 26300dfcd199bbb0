"""What a model does on the calibration text: token windows, collectors and their statistics."""
