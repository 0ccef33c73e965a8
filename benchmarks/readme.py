"""Writes the result tables of README and docs from the result files; `--check` only says whether they are current."""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bits_section
import bits_times_section
import calibration_goals_section
import config_section
import decode_section
import experts_section
import float8_section
import float8_whole_section
import front_section
import inventory_section
import layer_sections
import layers_in_formats_section
import matrix_section
import means_section
import model_sections
import other_methods_section
import packed_section
import quality_sections
import refined_section
import robustness_section
import rounding_section
import scale_section
import sentences_section
import several_gpus_section
import shortfalls_section
import structures_in_int4_section
import text_ratio_sections
import tools_section
import zoo_section

ROOT = Path(__file__).parents[1]

#: {document: {marker: what stands between its begin and its end}}
DOCUMENTS = {
    ROOT / "README.md": {
        "front": front_section.front_section,
        "refined": refined_section.refined_section,
    },
    ROOT / "docs" / "measured.md": {
        "front-protocol": front_section.protocol_section,
        "demo": quality_sections.demo_section,
        "sentences": sentences_section.sentences_section,
        "sentences-h200": partial(sentences_section.sentences_section, "sentences_h200.json"),
        "text-ratios": text_ratio_sections.text_ratio_section,
        "means": means_section.means_section,
        "other-methods": other_methods_section.other_methods_section,
        "quality": quality_sections.quality_section,
        "shapes": quality_sections.shapes_section,
        "ladder": quality_sections.ladder_section,
        "speed": layer_sections.speed_section,
        "groups": layer_sections.groups_section,
        "experts": experts_section.experts_section,
        "roofline": layer_sections.roofline_section,
        "models": model_sections.models_section,
        "papers": model_sections.papers_section,
        "profiles": model_sections.profiles_section,
        "storage": model_sections.storage_section,
        "counters": layer_sections.counters,
        "float8": float8_section.float8_section,
        "layers-in-formats": layers_in_formats_section.layers_section,
        "layers-in-formats-predicted": layers_in_formats_section.predicted_section,
        "float8-groups": float8_whole_section.groups_section,
        "float8-prefill": float8_whole_section.prefill_section,
        "float8-training": float8_whole_section.training_section,
        "packed-decode": packed_section.packed_decode_section,
        "decode-in-bits": decode_section.decode_section,
        "dependent-launches": model_sections.dependent_launches_section,
    },
    ROOT / "docs" / "api.md": {
        "config": config_section.config_section,
    },
    ROOT / "docs" / "models.md": {
        "matrix": matrix_section.matrix_section,
        "tools": tools_section.tools_section,
    },
    ROOT / "docs" / "calibration.md": {
        "zoo": zoo_section.zoo_section,
        "default-text": calibration_goals_section.default_text_section,
    },
    ROOT / "docs" / "trust.md": {
        "robustness": robustness_section.robustness_section,
        "endurance": robustness_section.endurance_section,
        "scale": scale_section.cpu_section,
        "scale-gpu": scale_section.gpu_section,
    },
    ROOT / "docs" / "several-gpus.md": {
        "several-gpus": several_gpus_section.several_gpus_section,
    },
    ROOT / "docs" / "formats.md": {
        "rounding": rounding_section.rounding_section,
        "rounding-steps": rounding_section.steps_section,
    },
    ROOT / "docs" / "bits.md": {
        "bits": bits_section.bits_section,
        "bits-best": bits_section.best_section,
        "bits-mixture": bits_section.mixture_section,
        "k-quants": bits_section.k_quants_section,
        "structures-in-int4": structures_in_int4_section.structures_section,
        "bits-times": bits_times_section.times_section,
    },
    ROOT / "docs" / "kernels.md": {
        "decoding-shortfalls": shortfalls_section.decoding_section,
        "layer-shortfalls": shortfalls_section.layers_section,
    },
    ROOT / "docs" / "log.md": {
        "result-files": inventory_section.inventory_section,
        "bits-goals": bits_section.goals_section,
        "calibration-goals": calibration_goals_section.goals_section,
    },
}


def updated(text: str, sections: dict) -> str:
    """A document with each section between its markers written anew."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{section()}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    current = True
    for path, sections in DOCUMENTS.items():
        text = path.read_text()
        new = updated(text, sections)
        current = current and new == text
        if not args.check:
            path.write_text(new)
    return int(args.check and not current)


if __name__ == "__main__":
    sys.exit(main())
