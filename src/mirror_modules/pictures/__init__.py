"""Pictures from tensors: image grids with captions, attention maps, PNG files."""
