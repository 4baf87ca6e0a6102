"""The demo: does looping pay at equal stored parameters? Three models, one text, one page."""

from ouroboros.demo.run import DemoStopped, run_demo

__all__ = ["DemoStopped", "run_demo"]
