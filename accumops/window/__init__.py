"""Windows of micro-batches: their state machine and gradients. Knows no optimizer, layer or model."""
