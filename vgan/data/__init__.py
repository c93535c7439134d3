"""Data sets: sources of images, their packed form, loaders and augmentation."""
