"""One no-op job for each system that `workers.py` measures, each with the settings that its documentation recommends.

Each module is what its system's worker command loads. It takes the broker from ``BENCH_URL``, and has
``fill(count)``, which enqueues so many jobs and is called by `fill.py`. Results of jobs are kept nowhere."""
