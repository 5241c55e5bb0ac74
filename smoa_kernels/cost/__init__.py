"""What a layer costs: counted, predicted, extrapolated to many GPUs."""
