"""Hypothesis profiles: "ci" draws the same examples on every run, "explore" draws new ones and more of them
(HYPOTHESIS_PROFILE=explore), "no-shrink" stops at the first failure as it was drawn."""

import os

from hypothesis import HealthCheck, Phase, settings

SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}

settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **SLOW_IS_FINE)
settings.register_profile("explore", **SLOW_IS_FINE)
settings.register_profile("no-shrink", parent=settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
