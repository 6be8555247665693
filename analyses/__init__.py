"""Scripts that sweep a model, print the answer and write the report: `python -m analyses.eight_schools`."""
