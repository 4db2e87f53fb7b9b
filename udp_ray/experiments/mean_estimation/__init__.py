"""The mean-estimation study: ELS against ULS on synthetic users."""
