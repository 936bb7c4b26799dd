"""Keeps dm_control from looking for a display that does not exist."""

from __future__ import annotations

import importlib
import os
import sys

from meam_policy.extras import raise_interrupt

__all__ = ["disable_dm_control_drawing"]


def disable_dm_control_drawing() -> None:
    """Import dm_control without a renderer if this process has no display to draw on.

    OGBench's manipulation tasks build their scenes with dm_control, whose first import starts GLFW, and GLFW warns
    where it finds no display. They draw with MuJoCo's own renderer, so nothing is lost. Where `MUJOCO_GL` chooses a
    renderer, where dm_control has been imported before, or where there is a display, nothing is changed.
    """
    display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform != "linux" or display or "MUJOCO_GL" in os.environ or "dm_control" in sys.modules:
        return
    # dm_control looks when it is imported; MuJoCo, which looks at the same variable, must not see it.
    os.environ["MUJOCO_GL"] = "disable"
    try:
        importlib.import_module("dm_control._render")
    except ImportError as error:  # said where it is needed
        raise_interrupt(error)
    finally:
        del os.environ["MUJOCO_GL"]
