"""Human study: raters compare images of two runs without knowing the runs."""
