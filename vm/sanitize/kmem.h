/*
 * For the sanitized rump kernel: what kern_event.c allocates comes from the
 * host's malloc, where AddressSanitizer sees it.  kmem(9) is made of pools,
 * which hide overflows and uses after free.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/kmem.h>

int	rumpuser_malloc(size_t, int, void **);
void	rumpuser_free(void *, size_t);

static inline void *
asan_kmem(size_t size)
{
	void *p;

	return rumpuser_malloc(size, 0, &p) == 0 ? p : NULL;
}

#define kmem_alloc(size, flags)		asan_kmem(size)
#define kmem_zalloc(size, flags)	memset(asan_kmem(size), 0, size)
#define kmem_free(p, size)		rumpuser_free(p, size)
