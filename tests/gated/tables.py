"""The tables of demos/docs/swiglu.md, from the stored results."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "demos" / "docs" / "swiglu.md"

RESULTS = Path(__file__).with_name("results.json")


def tables(results):
    """Markdown tables by the marker of their place: pieces, finetuning, loss added, fidelity, costs."""
    steps = [
        "| model | what replaces its MLPs | one layer | half | all |",
        "| --- | --- | --- | --- | --- |",
    ]
    layers = [
        "| model | layer | worst | of | overall | ordinary | massive tokens | loss added |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in results["models"].items():
        for label, step in one["steps"].items():
            steps.append(
                f"| {name} | {label} | {step['one']:.3f} | {step['half']:.3f} | {step['all']:.3f} |"
            )
        left = one["left_out"]
        for count, loss in enumerate(left["loss"][1:], 1):
            named = " and ".join(map(str, left["order"][:count]))
            steps.append(f"| {name} | wider, layer {named} left out |  |  | {loss:.3f} |")
        for row in one["fidelity"]:
            layers.append(
                f"| {name} | {row['layer']:.0f} | {row['worst']:.2f} | {row['worst_of']} | "
                f"{row['overall']:.3f} | {row['ordinary']:.3f} | {row['massive']:.0f} "
                f"({row['massive_share']:.0%}) | {row['loss_added']:.3f} |"
            )
    costs = [
        "| layer, fit | inputs | CPU seconds | peak of the process |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in results["costs"].items():
        costs.append(
            f"| {name} | {one['inputs']:,} | {one['seconds']:.0f} | {one['bytes'] / 1e9:.1f} GB |"
        )
    runs = ["| learning rate | run | tokens | loss | gap |", "| --- | --- | --- | --- | --- |"]
    for rate, one in results["finetune"].items():
        for name, run in one["runs"].items():
            runs.append(
                f"| {rate} | {name} | {run['tokens']:,} | {run['loss']:.3f} | {run['gap']:.3f} |"
            )
    regions = [
        "| model | what replaces its MLPs | hidden neurons | one layer | all |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in results["pieces"].items():
        for label, step in one.items():
            regions.append(
                f"| {name} | {label} | {step['neurons']} h | {step['one']:.3f} | {step['all']:.3f} |"
            )
    made = {"pieces": regions, "finetune": runs, "steps": steps, "fidelity": layers, "costs": costs}
    return {name: "\n".join(lines) for name, lines in made.items()}


def written(page, results):
    """The page with the tables behind their markers."""
    for name, table in tables(results).items():
        before, after = page.split(f"<!-- {name} -->\n")
        rest = after[after.index("\n\n", 1) :] if after.startswith("\n|") else "\n" + after
        page = f"{before}<!-- {name} -->\n\n{table}{rest}"
    return page
