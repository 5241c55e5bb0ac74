"""Where an update goes: in the spectrum of a layer, of a model, as a figure."""
