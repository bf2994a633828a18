"""The looped block and the model, as declarative lists of layers."""
