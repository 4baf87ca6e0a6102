"""The demo: does looping pay at equal stored parameters? A looped model and its twins, one text, one page."""

from ouroboros.demo.run import DemoStopped, run_demo

__all__ = ["DemoStopped", "run_demo"]
