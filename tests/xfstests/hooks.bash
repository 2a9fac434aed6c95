# Sourced by the configuration that scripts/xfstests writes: what xfstests leaves out for FUSE
# file systems (mkfs, sized mkfs, fsck after each test, shutdown), done with braidfs.
#
# xfstests reads its configuration first and defines its functions afterwards, so a function that
# is defined here would be replaced. The trap below waits until they are all there.

# Makes the volume of a device anew. Its members together have this many bytes; each gets at least
# 32 MiB, so small volumes have fewer members. The first member is the device itself.
braidfs_mkfs() { # device, bytes
    local name=${1##*/} members count member_size image
    mapfile -t members <"$BRAIDFS_VOLUMES/$name.members"
    image=$(<"$BRAIDFS_VOLUMES/$name.image")
    count=$(($2 / (32 << 20)))
    [ "$count" -ge 1 ] || count=1
    [ "$count" -le "${#members[@]}" ] || count=${#members[@]}
    member_size=$(($2 / count / 4096 * 4096))
    # Emptied, then as long as wanted, so no old bytes stay.
    truncate --size 0 "$image" "${members[@]:1}"
    truncate --size "$member_size" "$image" "${members[@]:1:count-1}"
    losetup --set-capacity "$1"
    printf '%s\n' "${members[@]:0:count}" >"$BRAIDFS_VOLUMES/$name.used"
    "$BRAIDFS_BIN" mkfs --force "${members[@]:0:count}"
}

# Checks the unmounted volume of a device.
braidfs_fsck() { # device
    local members status=0
    mapfile -t members <"$BRAIDFS_VOLUMES/${1##*/}.used"
    "$BRAIDFS_BIN" fsck -n "${members[@]}" >"$tmp.braidfs_fsck" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        _log_err "fsck: the file system on $1 is inconsistent ($status)"
        { echo "*** fsck of $1: $status"; cat "$tmp.braidfs_fsck"; } >>"$seqres.full"
    fi
    rm -f "$tmp.braidfs_fsck"
    return "$status"
}

# Waits until no loop device has a file of a mount any more: one that is detached while something is
# still on its way out of it lets go of its file a moment later.
braidfs_wait_for_loops() { # mount point
    local tries=300
    while losetup --noheadings --output BACK-FILE | grep -qF "$1/" && [ $((tries -= 1)) -gt 0 ]; do
        sleep 0.1
    done
}

# Ends the daemon of a mount at once. With `flush`, what was done before is made durable first.
braidfs_shutdown() { # mount point, flush or nothing
    local mount_point=$1 process words
    [ "${2:-}" != flush ] || "$BRAIDFS_XFS_IO" -r -c fsync "$mount_point"
    for process in /proc/[0-9]*; do
        mapfile -d '' -t words 2>/dev/null <"$process/cmdline" || continue
        [ "${words[0]:-}" = braidfs ] && [ "${words[2]:-}" = --daemon-child ] || continue
        [ "${words[-1]}" = "$mount_point" ] || continue
        kill -KILL "${process#/proc/}"
        # What the dying process still holds keeps the members busy.
        while compgen -G "$process/fd/*" >/dev/null; do sleep 0.02; done
        return 0
    done
    echo "shutdown: no daemon serves $mount_point" >&2
    return 1
}

braidfs_replace_functions() {
    # The kernel shows the subtype; xfstests only knows `fuse`.
    _fs_type() { _df_device "$1" | awk '{ print $2 }' | sed 's/^fuse\.braidfs$/fuse/'; }

    _require_names_are_bytes() { :; }

    # Tests that call mount(8) themselves name the type, which names no server.
    _mount() {
        local word words=()
        for word in "$@"; do
            [ "$word" != fuse ] || word=fuse.braidfs
            words+=("$word")
        done
        $MOUNT_PROG "${words[@]}"
    }

    _scratch_mkfs() {
        _scratch_unmount >/dev/null 2>&1
        braidfs_mkfs "$SCRATCH_DEV" "$BRAIDFS_VOLUME_SIZE"
    }
    # Also of devices that a test made itself.
    _try_mkfs_dev() {
        local device=${*: -1}
        if [ -e "$BRAIDFS_VOLUMES/${device##*/}.members" ]; then
            braidfs_mkfs "$device" "$BRAIDFS_VOLUME_SIZE"
        else
            "$BRAIDFS_BIN" mkfs --force "$device"
        fi
    }
    _try_scratch_mkfs_sized() {
        local least=$((32 << 20))
        [ "$1" -ge "$least" ] || _notrun "braidfs needs $least bytes, the test wants $1"
        _scratch_unmount >/dev/null 2>&1
        braidfs_mkfs "$SCRATCH_DEV" "$1"
    }
    _get_device_size() { echo $((BRAIDFS_VOLUME_SIZE / 1024)); }

    # Called when the test is over: unmounts, checks.
    _check_dev_fs() {
        local status=0 mount_point
        mount_point=$(findmnt --noheadings --first-only --output TARGET --source "$1")
        [ -z "$mount_point" ] || braidfs_wait_for_loops "$mount_point"
        _unmount "$1" >/dev/null 2>&1
        braidfs_fsck "$1" || status=$?
        # A test in the middle of its work goes on with what was mounted.
        [ -z "$mount_point" ] || [ "$mount_point" != "$SCRATCH_MNT" ] || _try_scratch_mount
        return "$status"
    }
    _check_test_fs() {
        braidfs_wait_for_loops "$TEST_DIR"
        _test_unmount >/dev/null 2>&1
        braidfs_fsck "$TEST_DEV" && _test_mount
    }
    # There is no repair: the volume is made anew.
    _repair_test_fs() { braidfs_mkfs "$TEST_DEV" "$BRAIDFS_VOLUME_SIZE" >/dev/null; }
    _repair_scratch_fs() { braidfs_fsck "$SCRATCH_DEV"; }

    _require_scratch_shutdown() {
        _scratch_mkfs >/dev/null 2>&1 || _notrun "mkfs failed on $SCRATCH_DEV"
    }
    _scratch_shutdown() {
        local word how=
        for word in "$@"; do [ "$word" != -f ] || how=flush; done
        braidfs_shutdown "$SCRATCH_MNT" "$how"
    }
    # Without a journal to replay, a write-protected device can be mounted after a crash, too. For
    # all other tests it is as if there were one.
    _has_metadata_journaling() { [ "$seq" != 050 ]; }
    _require_xfs_io_shutdown() {
        _notrun "no shutdown from inside xfs_io: the request reaches the server without its flags"
    }
    _require_scratch_shutdown_and_syncfs() {
        _notrun "a server that is gone cannot answer syncfs"
    }
}

braidfs_hook() {
    declare -F init_rc >/dev/null || return 0
    trap - RETURN
    braidfs_replace_functions
}
trap braidfs_hook RETURN
