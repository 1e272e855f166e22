#!/usr/bin/env bash
# Collects the wheels that a GPU host without network lacks, in parts that travel one by one, and
# joins them there. docs/gpu.md says which host and what for.
#
#   tools/gpu_bundle.sh [--for kernels|serving] [--part-mib N] [--to FOLDER] [PACKAGE...]
#   tools/gpu_bundle.sh --join [FROM [TO]]                          check and join there
#
# Defaults: kernels, for benchmarks/kernels; 60 MiB; .whl, where folders part<i> are made; --join
# .whl /tmp/ess_wheels. serving: also what SGLang's server needs on DeepSeek-V3.2, torch included;
# for a card of sm_90. The packages are those of gpu_wheels.txt and PACKAGEs, at the versions of
# constraints.txt. What does not fit goes on in the next part.
# LISTED names another list. PYTHON_VERSION=3.12 is the host's Python; PYTHON the interpreter whose
# pip downloads, and which unpacks. XZ_OPT=-1 makes it quicker and a tenth larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_VERSION=${PYTHON_VERSION:-3.12}
GLIBC_MINORS=({39..17}) # pip matches manylinux_2_N exactly

say() { echo "gpu_bundle: $*" >&2; }

die() {
  say "$*"
  exit 1
}

find_python() { # module: prints an interpreter that has it
  local name
  for name in ${PYTHON:-.venv/bin/python python3}; do
    if "$name" -c "import $1" >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  die "a Python with $1 must be there: got none. Set PYTHON."
}

listed() { # kernels|serving: its packages
  sed 's/#.*//' "${LISTED:-tools/gpu_wheels.txt}" |
    awk -v wanted="$1" '$1 == "kernels" || $1 == "serving" && wanted == "serving" { print $2 }'
}

download() { # folder package...
  local folder=$1 python minor platforms=()
  shift
  python=$(find_python pip)
  for minor in "${GLIBC_MINORS[@]}"; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --implementation cp --python-version "$PYTHON_VERSION" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -c constraints.txt -d "$folder" "$@" </dev/null ||
    die "pip must find a wheel for Python $PYTHON_VERSION on x86-64: got the error above."
}

new_part() { # uses and sets: part, used
  part=$((part + 1)) used=0
  mkdir "$to/part$part"
}

fill() { # file: into part$part up to its limit, then into new ones; uses and sets part, used
  local file=$1 name size offset=0 piece=0 take
  name=$(basename "$file") size=$(stat -c %s "$1")
  if [ "$size" -le $((limit - used)) ]; then
    cp "$file" "$to/part$part/"
    used=$((used + size))
    return
  fi
  while [ "$offset" -lt "$size" ]; do
    [ "$used" -lt "$limit" ] || new_part
    take=$((size - offset < limit - used ? size - offset : limit - used))
    dd if="$file" of="$to/part$part/$name.piece$(printf %03d "$piece")" bs=1M status=none \
      iflag=skip_bytes,count_bytes skip="$offset" count="$take"
    offset=$((offset + take)) used=$((used + take)) piece=$((piece + 1))
  done
}

collect() { # kernels|serving part_mib to package...
  local set=$1 limit=$(($2 << 20)) to=$3 python file part=0 used=0 i
  shift 3
  python=$(find_python pip)
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/all" "$work/slim"
  # shellcheck disable=SC2046  # one word a package
  download "$work/all" $(listed "$set") "$@"
  for file in "$work"/all/*.whl; do # one by one: torch unpacked is 1.3 GB
    "$python" tools/gpu_slim.py "$work/slim" "$file"
    rm "$file"
    xz -T 0 "$work/slim/$(basename "$file")"
  done
  rm -rf "$to"/part*
  mkdir -p "$to"
  (cd "$work/slim" && sha256sum -- *.xz) >"$work/SHA256SUMS"
  # Room in every part for the lists of checksums: of all wheels, and of what the part has.
  limit=$((limit - 2 * $(stat -c %s "$work/SHA256SUMS") - 1024))
  new_part
  while IFS= read -r file; do fill "$work/slim/$file"; done < <(cd "$work/slim" && ls -S)
  for ((i = 1; i <= part; i++)); do
    (cd "$to/part$i" && sha256sum -- *.whl* >PART.sha256 && cp "$work/SHA256SUMS" .)
  done
  for ((i = 1; i <= part; i++)); do
    printf '%s/part%d  %s KiB\n' "$to" "$i" "$(du -sk --apparent-size "$to/part$i" | cut -f1)"
    (cd "$to/part$i" && du -k --apparent-size -- *.whl* | sort -rn)
  done
}

unpack() { # file.xz: beside it; the host's xz may be missing, its Python is not
  "$(find_python lzma)" -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[1] + ".part", "wb"), 1 << 20)' "$1" &&
    mv "$1.part" "${1%.xz}" && rm "$1"
}

join() { # from to: what is whole goes to `to`, unpacked; says what is still to come
  local from=$1 to=$2 sums name sum missing=0 job jobs=()
  sums=$(find "$from" -name SHA256SUMS -print -quit 2>/dev/null)
  [ -n "$sums" ] || die "$from must hold parts of a bundle: got no SHA256SUMS."
  mkdir -p "$to"
  while IFS= read -r name; do # a spoilt piece cannot be told from a missing one later
    (cd "$(dirname "$name")" && sha256sum --check --quiet PART.sha256) >&2 ||
      die "$(dirname "$name") must have the checksums it left with: got others. Carry it again."
  done < <(find "$from" -name PART.sha256)
  while read -r sum name; do
    [ ! -f "$to/$name" ] && [ -f "$to/${name%.xz}" ] && continue # unpacked by an earlier call
    find "$from" -type f -name "$name*" -exec cp -n {} "$to/" \;
    if [ ! -f "$to/$name" ] && compgen -G "$to/$name.piece*" >/dev/null; then
      cat "$to/$name".piece* >"$to/$name.joined"
      if echo "$sum  $to/$name.joined" | sha256sum --check --status -; then
        mv "$to/$name.joined" "$to/$name"
        rm -f "$to/$name".piece*
      else
        rm -f "$to/$name.joined" # a piece is still to come
      fi
    fi
    if [ ! -f "$to/$name" ]; then
      say "${name%.xz}: in a part that is not here"
      missing=1
    elif ! echo "$sum  $to/$name" | sha256sum --check --quiet - >&2; then
      rm -f "$to/$name"
      die "$name must have the checksum it left with: got another. Carry its part again."
    elif [ "$name" != "${name%.xz}" ]; then
      unpack "$to/$name" &
      jobs+=($!)
    fi
  done <"$sums"
  for job in "${jobs[@]}"; do wait "$job" || die "a wheel must unpack: got the error above."; done
  return $missing
}

set=kernels part_mib=60 to=.whl
if [ "${1:-}" = --join ]; then
  join "${2:-.whl}" "${3:-/tmp/ess_wheels}"
  exit
fi
while [ $# -gt 0 ]; do
  case $1 in
    --for) set=${2:-} && shift 2 ;;
    --part-mib) part_mib=$2 && shift 2 ;;
    --to) to=$2 && shift 2 ;;
    -*) die "an option must be --for, --part-mib, --to or --join: got $1." ;;
    *) break ;;
  esac
done
[[ $set = kernels || $set = serving ]] || die "--for must be kernels or serving: got $set."
collect "$set" "$part_mib" "$to" "$@"
