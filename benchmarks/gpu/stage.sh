#!/usr/bin/env bash
# Prepare .gpu/ in the root of the checkout: wheels that a GPU machine without network lacks, and these scripts.
#
#     bash benchmarks/gpu/stage.sh
#
# Needs no GPU.  Then copy the checkout with .gpu to the GPU machine; see README.md.  .gpu is never committed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$PWD
[ -f "$root/pyproject.toml" ] && [ -d "$root/cospadi" ] || { echo "run this from the root of the checkout"; exit 2; }
pip=${PIP:-"python3 -m pip"}
python_version=${GPU_PYTHON:-3.12}

exclude=$(git -C "$root" rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")"
grep -qxF /.gpu/ "$exclude" 2>/dev/null || echo /.gpu/ >>"$exclude"

# What the project needs beyond a machine with torch and cupy; the range of transformers is the project's own.
transformers=$(sed -n 's/^ *"\(transformers[^"]*\)".*/\1/p' "$root/pyproject.toml" | head -1)
wanted=("${transformers:-transformers>=5.20,<6}" greenlet array-api-compat array-api-strict pydantic annotated-types
        typing-inspection "typing-extensions>=4.16"
        lazy-loader)
platforms=()
for tag in manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
           manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
get() {
  $pip download -q --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
    "${platforms[@]}" -d "$root/.gpu/wheels" "$@" 2>&1 | grep -v "^WARNING: Location" || true
}

rm -rf "$root/.gpu"
mkdir -p "$root/.gpu/wheels"
for one in "${wanted[@]}"; do get "$one"; done
# pydantic takes exactly one version of its core.
core=$(python3 - "$root"/.gpu/wheels/pydantic-*.whl <<'PY'
import re, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    print("pydantic-core" + re.search(r"^Requires-Dist: pydantic[-_]core *\(?(==[^;)\s]+)", wheel.read(name).decode(), re.M)[1])
PY
)
get "$core"

missing=0
for name in transformers greenlet array_api_compat array_api_strict pydantic pydantic_core annotated_types \
            typing_inspection typing_extensions lazy_loader; do
  count=$(find "$root/.gpu/wheels" -name "$name-*.whl" | wc -l)
  [ "$count" = 1 ] || { echo "$name: $count wheels, expected one"; missing=1; }
done
cp "$here"/run.sh "$here"/steps.sh "$here"/*.py "$root/.gpu/"

tree=$(git -C "$root" ls-files -co --exclude-standard -z | (cd "$root" && xargs -0 du -cb --apparent-size 2>/dev/null) | awk '$2 == "total" {s += $1} END {print s}')
staged=$(du -sb "$root/.gpu" | cut -f1)
echo "staged $((staged / 1048576)) MiB of wheels and scripts beside $((tree / 1048576)) MiB of working tree (limit 64 MiB in all)"
ls -l "$root/.gpu/wheels" | awk 'NR > 1 {printf "  %9d %s\n", $5, $9}'
exit $missing
