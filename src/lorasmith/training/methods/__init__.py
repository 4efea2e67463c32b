"""Methods of training: a file each for what a step does besides comparing one prediction with its target."""
