"""The methods: for each, the loss_fn that a train step takes and the builder of its batches."""
