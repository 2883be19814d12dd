"""Zero-shot evaluation of compositions: scores, statistics, controls and plots."""
