/*
 * What userlands before NetBSD 10 lack of sys/event.h, and a newer kernel
 * under them has.
 */
#include <sys/event.h>
#ifndef EVFILT_USER
#define	EVFILT_USER 8U
#define	NOTE_FFNOP 0U
#define	NOTE_FFAND 0x40000000U
#define	NOTE_FFOR 0x80000000U
#define	NOTE_FFCOPY 0xc0000000U
#define	NOTE_FFCTRLMASK 0xc0000000U
#define	NOTE_FFLAGSMASK 0x00ffffffU
#define	NOTE_TRIGGER 0x01000000U
#endif
#ifndef EV_RECEIPT
#define	EV_RECEIPT 0x0040U
#define	EV_DISPATCH 0x0080U
#endif
#ifndef NOTE_ABSTIME
#define	NOTE_MSECONDS 0U
#define	NOTE_SECONDS 1U
#define	NOTE_USECONDS 2U
#define	NOTE_NSECONDS 3U
#define	NOTE_ABSTIME 0x10U
#endif
