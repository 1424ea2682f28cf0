"""The mechanism: tensors, selection, batches, regularizers and how they attach."""
