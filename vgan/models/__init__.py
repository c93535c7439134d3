"""Generators, the discriminator and their layers. Constructors take plain arguments."""
