/*
 * A kernel that does as its command line says, for tests of what happens when a
 * guest misbehaves.  QEMU starts it directly, by PVH: in 32-bit protected mode,
 * with interrupts off and %ebx pointing to struct hvm_start_info.
 *
 * The text of the command line goes to the first serial port, but for
 *
 *	%n	a new line		%e	an escape character
 *	%w	wait for a line on the serial port
 *	%l	start over		%h	halt
 *	%r	reset			%t	triple fault, which resets, too
 *	%p	power off
 *
 * At the end of the text it spins in silence.
 */

#define	COM		0x3f8
#define	COM_LSR		0x3fd		/* line status: */
#define	 LSR_RXRDY	0x01		/*  a byte has come */
#define	 LSR_TXRDY	0x20		/*  a byte can go */
#define	KBC		0x64		/* keyboard controller, which has the reset line */
#define	 KBC_RESET	0xfe
#define	PM1A_CNT	0x604		/* where SeaBIOS puts it on QEMU's q35 */
#define	 SLP_EN		0x2000		/* with sleep type 0: S5 */
#define	CMDLINE_PADDR	24		/* in hvm_start_info */
#define	PHYS32_ENTRY	18		/* XEN_ELFNOTE_PHYS32_ENTRY */

	.section .note.Xen, "a", @note
	.long	4, 4, PHYS32_ENTRY
	.asciz	"Xen"
	.long	_start

	.text
	.globl	_start
_start:	mov	CMDLINE_PADDR(%ebx), %esi
next:	lodsb
	test	%al, %al
	jz	spin
	cmp	$'%', %al
	jne	print
	lodsb
	cmp	$'w', %al
	je	wait
	cmp	$'l', %al
	je	_start
	cmp	$'h', %al
	je	halt
	cmp	$'r', %al
	je	reset
	cmp	$'t', %al
	je	fault
	cmp	$'p', %al
	je	off
	cmp	$'n', %al
	jne	1f
	mov	$10, %al
1:	cmp	$'e', %al
	jne	print
	mov	$27, %al

print:	mov	%al, %cl
	mov	$COM_LSR, %dx
1:	in	%dx, %al
	test	$LSR_TXRDY, %al
	jz	1b
	mov	$COM, %dx
	mov	%cl, %al
	out	%al, %dx
	jmp	next

wait:	mov	$COM_LSR, %dx
1:	in	%dx, %al
	test	$LSR_RXRDY, %al
	jz	1b
	mov	$COM, %dx
	in	%dx, %al
	cmp	$10, %al
	jne	wait
	jmp	next

halt:	hlt
	jmp	halt

reset:	mov	$KBC_RESET, %al
	out	%al, $KBC
	jmp	spin

fault:	lidt	no_idt
	ud2

off:	mov	$PM1A_CNT, %dx
	mov	$SLP_EN, %ax
	out	%ax, %dx

spin:	jmp	spin

no_idt:	.word	0
	.long	0
