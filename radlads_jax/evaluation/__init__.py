"""A model scored: lm-eval tasks, long-context probes, the published scores."""
