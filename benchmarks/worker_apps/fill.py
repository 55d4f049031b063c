"""python -m worker_apps.fill APP COUNT: enqueue so many jobs. Apart from the apps, whose jobs carry their module's
name."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(f"worker_apps.{sys.argv[1]}").fill(int(sys.argv[2]))
