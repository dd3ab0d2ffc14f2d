package modaltest_test

import (
	"context"
	"io"
)

// readAll reads to the end, but gives up with ctx: reads of the SDK do not end by one.
func readAll(ctx context.Context, r io.ReadCloser) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	return io.ReadAll(r)
}
