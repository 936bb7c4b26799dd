"""Policy folders, local and on the Hugging Face Hub."""

import os

from meam_policy.errors import ConfigError

for _name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # read by huggingface_hub when it is imported
    _value = os.environ.get(_name)
    if _value is not None and not _value.strip().isdecimal():
        raise ConfigError(
            f"The variable {_name} is {_value!r}; expected whole seconds, such as 60. Set it, or unset it."
        )
