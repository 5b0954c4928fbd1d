"""Makes `import benchmarks` mean the clone's."""

from cosup_fast.cli.bench import load_benchmarks

load_benchmarks()
