"""Every mixer there is, by the name that a config gives it. A new one is its file and its line here."""

from radlads_jax.models import attention, gdn, rad_rwkv6, rad_rwkv7, window, window_rwkv7
from radlads_jax.models.spec import MixerSpec

_MODULES = (attention, rad_rwkv6, rad_rwkv7, gdn, window, window_rwkv7)
MIXERS: dict[str, MixerSpec] = {module.SPEC.name: module.SPEC for module in _MODULES}


def mixer_spec(name: str) -> MixerSpec:
    """Raises ValueError for a name that none has."""
    if name not in MIXERS:
        raise ValueError(f"config.student.mixer is {name!r}; expected one of {', '.join(MIXERS)}.")
    return MIXERS[name]


def mixer_titles() -> dict[str, str]:
    """What each mixer is called in text."""
    return {name: spec.title for name, spec in MIXERS.items()}
