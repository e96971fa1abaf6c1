"""The host side of pykq: from NetBSD sources to a patched kernel in a running guest.

One module a stage: source, patches, build, image, qemu, guest; what they share
is in cache, config, log and run.  Nothing here is imported by the pykq package.
"""
