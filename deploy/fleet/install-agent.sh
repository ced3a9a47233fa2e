#!/bin/sh
# Installs and enrols an agent on this machine. Doing it again changes nothing, except that another wheel is installed.
#
#   EBBFLOW_EDGE_TOKEN=ebb1.… sh install-agent.sh --wheel dist --cloud cloud.example:8444
#
# Prints one line of JSON at the end: {"agent": "agents/kiosk-7", "installed": true, "enrolled": true, "service": "systemd"}
set -eu
umask 022

wheel='' constraints='' cloud='' token='' name='' prefix=/opt/ebbflow state=/var/lib/ebbflow-edge extra=edge
python=python3 service=auto new_device=--new-device torch_index=https://download.pytorch.org/whl/cpu

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0"; cat <<'TEXT'

  --wheel PATH        the wheel to install, or a folder of wheels: the one for this machine is taken
  --constraints FILE  versions to install, as constraints.txt of the repository
  --cloud HOST:PORT   the cloud's enrolment listener; needed until the device is enrolled
  --token TEXT        what `ebbflow token create` prints; better EBBFLOW_EDGE_TOKEN, which stands in no list of processes
  --name NAME         the name that the device asks for; default: its host name
  --used-before       users of this device reported under another identity before: they wait until a window is over
  --prefix DIR        where the software goes (/opt/ebbflow)
  --state DIR         where the agent keeps its identity and releases (/var/lib/ebbflow-edge)
  --extra NAME        edge (the default), or edge-torch where the wheel holds no compiled engine
  --torch-index URL   where torch's CPU build is, used if it answers; '' leaves torch to pip's own index
  --python FILE       Python 3.11 or newer
  --service KIND      systemd, none, or auto (the default): systemd where it runs
TEXT
}
fail() { echo "install-agent: $1" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --help|-h) usage; exit 0 ;;
        --used-before) new_device=''; shift ;;
        --wheel|--constraints|--cloud|--token|--name|--prefix|--state|--extra|--torch-index|--python|--service)
            [ $# -ge 2 ] || fail "$1 needs a value"
            option=$(echo "${1#--}" | tr - _); eval "$option=\$2"; shift 2 ;;
        *) fail "unknown option $1; --help lists them" ;;
    esac
done
[ -n "$wheel" ] || fail "say which wheel: --wheel PATH"
for file in "$wheel" ${constraints:+"$constraints"}; do [ -r "$file" ] || fail "$file cannot be read"; done
case $extra in edge|edge-torch) ;; *) fail "--extra is edge or edge-torch, not $extra" ;; esac
case $service in systemd|none) ;; auto) if [ -d /run/systemd/system ]; then service=systemd; else service=none; fi ;;
    *) fail "--service is systemd, none or auto, not $service" ;; esac
command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or newer, or say --python FILE"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old: install Python 3.11 or newer, or say --python FILE"
# From a folder, the wheel compiled for this machine comes before the one that runs anywhere.
if [ -d "$wheel" ]; then
    platform=$("$python" -c 'import sysconfig as s; print(s.get_platform().replace("-", "_").replace(".", "_"))')
    wheels=$wheel wheel=''
    for kind in "$platform" any; do
        for file in "$wheels"/ebbflow-*-py3-none-"$kind".whl; do
            [ -e "$file" ] || continue
            [ -z "$wheel" ] || fail "$wheels has several wheels for $platform: say which one, --wheel FILE"
            wheel=$file
        done
        [ -z "$wheel" ] || break
    done
    [ -n "$wheel" ] || fail "$wheels has no wheel for $platform: build one on such a machine, or one without the C\
 libraries, which runs anywhere: CC=none python -m build --wheel"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: apt-get install python3-venv"

mkdir -p "$prefix" 2>/dev/null || true
[ -w "$prefix" ] || fail "$prefix cannot be written: be root, or say --prefix DIR"
if command -v flock >/dev/null; then
    exec 9>"$prefix/.lock"
    flock -n 9 || fail "another install-agent works on $prefix; wait for it"
fi

# Prints the torch that a wheel asks for, such as torch==2.13.0.
NAMED_TORCH='
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
print(re.search("torch==[0-9.]+", wheel.read(metadata).decode())[0])
'

software() {
    in_venv() { "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
    "$prefix/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$prefix" || return
    # torch alone comes from the second index, so that nothing else is looked up there.
    if [ "$extra" = edge-torch ] && [ -n "$torch_index" ] && "$prefix/bin/python" -c \
        "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/torch/', timeout=3)" "$torch_index" 2>/dev/null; then
        in_venv --extra-index-url "$torch_index" --no-deps "$("$prefix/bin/python" -c "$NAMED_TORCH" "$wheel")" || return
    fi
    in_venv ${constraints:+--constraint "$constraints"} "${wheel}[$extra]" || return
    # Another build of the same version counts as another wheel.
    in_venv --force-reinstall --no-deps "$wheel"
}
installed=false
digest=$(cat "$wheel" ${constraints:+"$constraints"} | sha256sum | cut -d' ' -f1)-$extra
if [ "$(cat "$prefix/.installed" 2>/dev/null || true)" != "$digest" ]; then
    rm -f "$prefix/.installed"
    software || fail "pip could not install the wheel; the lines above say why"
    echo "$digest" >"$prefix/.installed"
    installed=true
fi

enrolled=false
[ -e "$state/identity/agent.toml" ] || enrolled=true
EBBFLOW_EDGE_TOKEN=${token:-${EBBFLOW_EDGE_TOKEN:-}}
export EBBFLOW_EDGE_TOKEN
[ ! -e "$state/agent.db" ] || new_device=''  # people used it before
agent=$("$prefix/bin/ebbflow-edge" enrol --if-missing --state "$state" ${cloud:+--cloud "$cloud"} ${new_device:+"$new_device"} \
    --name "${name:-$(uname -n | tr 'A-Z_.' 'a-z--')}" </dev/null)
unset EBBFLOW_EDGE_TOKEN

if [ "$service" = systemd ]; then
    here=$(dirname "$0") unit=/etc/systemd/system/ebbflow-edge.service
    template=$here/ebbflow-edge.service
    [ -e "$template" ] || template=$here/../systemd/ebbflow-edge.service
    id ebbflow-edge >/dev/null 2>&1 || useradd --system --home-dir "$state" --shell /usr/sbin/nologin ebbflow-edge
    chown -R ebbflow-edge: "$state"
    sed -e "s|/opt/ebbflow/|$prefix/|g" -e "s|/var/lib/ebbflow-edge|$state|g" "$template" >"$prefix/.unit"
    verb=start
    [ "$installed" = false ] || verb=restart
    if ! cmp -s "$prefix/.unit" "$unit"; then
        cp "$prefix/.unit" "$unit"
        systemctl daemon-reload
        verb=restart
    fi
    systemctl enable --quiet ebbflow-edge
    systemctl "$verb" ebbflow-edge
fi
printf '{"agent": "%s", "installed": %s, "enrolled": %s, "service": "%s"}\n' "$agent" "$installed" "$enrolled" "$service"
