"""From the Gram of the inputs to the whitened problem and back, and the errors that it measures."""
