"""The tables of demos/docs/swiglu.md, from the stored results."""

from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")


def tables(results):
    """Markdown: loss added by step, fidelity by layer, and costs, in this order."""
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
        for row in one["fidelity"]:
            layers.append(
                f"| {name} | {row['layer']} | {row['worst']:.2f} | {row['worst_of']} | "
                f"{row['overall']:.3f} | {row['ordinary']:.3f} | {row['massive']} "
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
    return "\n\n".join("\n".join(each) for each in (steps, layers, costs))
