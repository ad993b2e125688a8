"""Real gloo processes for tests: the ones that the conformance suite starts."""

from danling.backends.torch.conformance.ranks import RankResult, free_port, rank_environment, run_ranks

__all__ = ["RankResult", "free_port", "rank_environment", "run_ranks"]
