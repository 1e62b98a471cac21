"""The project's speed goals, each a file of its own: ours beside what people use today, in one process.

python -m benchmarks                    # all, and the results into benchmarks/results.json and docs/performance.md
python -m benchmarks.fcos_assignment    # one, only printed
python -m benchmarks.gpu --out gpu      # everything about one NVIDIA GPU: docs/performance.md
"""
