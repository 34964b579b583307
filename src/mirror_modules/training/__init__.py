"""Training a MirrorGAN: recipes, the phases, the loop, evaluation and the report. Needs the extra `train`."""
