"""Thin bookkeeping shared by the experiments: devices, runs, metrics, checkpoints, evaluation, plots.

No models, losses, data, schedules or training loops: those live in the script that uses them.
"""
