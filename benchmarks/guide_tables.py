"""The guide's tables of throughput and memory beside what `run.py plan` reckons, as the rows of `docs/planning.md`.

python benchmarks/guide_tables.py
"""

from ultrathink_model.config import load_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.planning import make_plan
from ultrathink_model.planning.command import USUAL_UTILISATION
from ultrathink_model.planning.hardware import DEVICES
from ultrathink_model.planning.plan import GIB

SAMPLES = 100_000
# Profile, device, number of them; the guide's tokens a second and hours for 100,000 samples.
THROUGHPUT = (
    ("small", "gtx-1080-ti", 1, 5000, 4),
    ("medium", "rtx-3090", 1, 2000, 24),
    ("large", "a100-40gb", 1, 800, 7 * 24),
    ("large", "a100-40gb", 4, 3000, 2 * 24),
)
# Profile; the guide's parameters and gigabytes in 32 and in 16 bits.
MEMORY = (("small", "100 M", 6, 4), ("medium", "2 B", 24, 16), ("large", "10 B", 80, 48))
# What AdamW in float32 holds of a weight: itself, its gradient, two moments.
ADAMW_STATE = 16


def main() -> None:
    """Prints both tables."""
    for profile, name, ranks, speed, hours in THROUGHPUT:
        plan = make_plan(load_config(profile_path(profile)), ranks, SAMPLES)
        assert plan.tokens is not None
        planned = plan.tokens_per_second(DEVICES[name], USUAL_UTILISATION)
        implied = plan.tokens / speed / 3600
        fits = "fits" if plan.fits(DEVICES[name]) else "does not fit"
        print(
            f"| {profile} | {ranks} × {DEVICES[name].title} | {speed:,} | {planned:,.0f} | {hours} h | {implied:.1f} h "
            f"| {plan.tokens / planned / 3600:.1f} h | {fits} |"
        )
    for profile, parameters, single, half in MEMORY:
        plan = make_plan(load_config(profile_path(profile)))
        total = plan.parameters.total
        print(
            f"| {profile} | {parameters} | {total:,} | {single} / {half} GB | {total * ADAMW_STATE / GIB:.1f} GiB "
            f"| {plan.memory.total / GIB:.1f} GiB |"
        )


if __name__ == "__main__":
    main()
