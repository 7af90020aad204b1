"""The preflight job: it compiles a run's programs for other chips and reports what they cost."""
