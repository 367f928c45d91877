"""Semi-supervised training on top of :mod:`pglcl_ext`. Reserved: this version ships the extension alone."""
