"""What the quality benchmark runs beside plain factors: layers in fewer bits, the most telling first."""

from __future__ import annotations

from dataclasses import replace

from runs import OURS, Run

#: the method of whole matrices in bits: in a model that is turned, the strongest of simple rivals
GPTQ = "GPTQ"
#: the same without feedback between rows
COLUMNS = f"{GPTQ}, columns alone"
#: another library's, which reads no text
TORCHAO = "torchao"
#: numbers that share a scale; blocks of the small model's rows are divided by no power of two that large
GROUP, GROUP_IN_BLOCKS = 64, 48
BLOCKED = {"blast": (4, 4), "monarch": (4, 4)}
BUDGETS = (3.5, 3.25, 4.25, 2.25)


def runs_in_bits() -> list[Run]:
    """Each row of factors has the same format for the layers that the budget leaves whole."""

    def stored(name: str, group: int) -> dict:
        # eight bits need no groups, and ranks that groups divide are few
        return {"dense_format": name} | ({} if name in ("int8", "fp8") else {"group_size": group})

    def whole(name: str) -> Run:
        return Run(GPTQ, "dense", 1.0, settings=tuple(stored(name, GROUP).items()))

    def of_columns(name: str) -> Run:
        """Without Fisher information, rows know nothing of each other."""
        return replace(whole(name), method=COLUMNS, settings=(*stored(name, GROUP).items(), ("fisher", False)))

    def factors(structure: str, ratio: float, name: str) -> Run:
        blocks = BLOCKED.get(structure)
        settings = {"factor_format": name, **stored(name, GROUP_IN_BLOCKS if blocks else GROUP)}
        return Run(OURS, structure, ratio, blocks, settings=tuple(settings.items()))

    def shared(bits: float, group: int, method: str = OURS) -> Run:
        settings = {"bits_per_weight": bits, "group_size": group}
        return Run(method, "auto", 1.0, settings=tuple(settings.items()))

    def with_refined(run: Run) -> list[Run]:
        scales = replace(run, method=f"{run.method}, refined", kind="refine")
        more = {"factor_codes": "codes of factors too, refined", "codes": "codes too, refined"}
        trained = [replace(scales, method=f"{run.method}, {name}", trains=what) for what, name in more.items()]
        return [run, scales, *(trained[1:] if run.structure == "dense" else trained)]

    def by_torchao(name: str, method: str = TORCHAO, **own: str) -> Run:
        return Run(method, None, 1.0, kind="torchao", settings=tuple({**stored(name, GROUP), **own}.items()))

    return [
        *with_refined(whole("int4")),
        *with_refined(whole("int3")),
        *(run for bits in BUDGETS for run in with_refined(shared(bits, GROUP))),
        *(run for name in ("int4", "int8", "fp8") for run in with_refined(factors("low_rank", 0.8, name))),
        *(of_columns(name) for name in ("int4", "int3")),
        *(whole(name) for name in ("int8", "fp8", "int2")),
        # factors train as numbers on one half of the text, are rounded, and their scales train on the other
        replace(factors("low_rank", 0.8, "int4"), method=f"{OURS}, rounded between, refined", kind="refine around"),
        factors("low_rank", 0.8, "int3"),
        *(factors("low_rank", 0.5, name) for name in ("int8", "int4", "fp8")),
        *(factors(structure, 0.8, "int4") for structure in ("pivoted", "blast", "monarch")),
        *(by_torchao(name) for name in ("int4", "int8", "fp8")),
        by_torchao("int4", f"{TORCHAO}, HQQ", scales="hqq"),
        # with groups that divide the rows of blocks, which then compete
        shared(BUDGETS[0], GROUP_IN_BLOCKS, f"{OURS}, groups of {GROUP_IN_BLOCKS}"),
    ]
