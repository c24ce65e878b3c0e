"""The cost benchmark: what the engine costs beside its peers, as ratios of arms that take turns in one process.

`./run bench` starts it; docs/benchmarks.md says what each ratio means. Imports the engine only, never the service. One file
for each part, `(Workbench) -> Findings`; `peers/` holds what is compared with: ports of other projects' code, in our words.
"""
