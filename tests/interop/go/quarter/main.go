// Two sources of go-spiffe's that speak mTLS with each other twice a second, and a watch, until they are told to end (SIGTERM).
//
//	go run ./quarter SOCKET AWAY
//
// Nothing that comes may have expired when it comes, no handshake may fail, and an SVID may only be out of date while there is a
// file AWAY.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

var updates, expired, handshakes, failed, stale, staleWithServer atomic.Int64

type watcher struct{}

func (watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	updates.Add(1)
	for _, svid := range c.SVIDs {
		if !time.Now().Before(svid.Certificates[0].NotAfter) {
			expired.Add(1)
			fmt.Printf("%s: came when it had expired: %s\n", time.Now().Format(time.TimeOnly), svid.ID)
		}
	}
}

func (watcher) OnX509ContextWatchError(error) {}

func source(ctx context.Context, socket string) *workloadapi.X509Source {
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		fmt.Printf("FAILED: %v\n", err)
		os.Exit(1)
	}
	return s
}

func fresh(s *workloadapi.X509Source) bool {
	svid, err := s.GetX509SVID()
	// A handshake takes a moment.
	return err == nil && time.Now().Add(2*time.Second).Before(svid.Certificates[0].NotAfter)
}

func handshake(address string, client *workloadapi.X509Source) error {
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	conn, err := tls.DialWithDialer(dialer, "tcp", address, tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeAny()))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	// The server has verified the client when it answers.
	_, err = conn.Read(make([]byte, 1))
	return err
}

func main() {
	socket, away := os.Args[1], os.Args[2]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	server, client := source(ctx, socket), source(ctx, socket)
	go workloadapi.WatchX509Context(ctx, watcher{}, workloadapi.WithAddr("unix://"+socket)) //nolint:errcheck // it ends with us
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeAny()))
	if err != nil {
		fmt.Printf("FAILED: %v\n", err)
		os.Exit(1)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.Write([]byte("x")) //nolint:errcheck // the client sees it
			}()
		}
	}()
	fmt.Println("up")
	for ctx.Err() == nil {
		if fresh(server) && fresh(client) {
			handshakes.Add(1)
			if err := handshake(listener.Addr().String(), client); err != nil {
				failed.Add(1)
				fmt.Printf("%s: handshake: %v\n", time.Now().Format(time.TimeOnly), err)
			}
		} else {
			stale.Add(1)
			if _, err := os.Stat(away); err != nil {
				staleWithServer.Add(1)
				fmt.Printf("%s: out of date\n", time.Now().Format(time.TimeOnly))
			}
		}
		time.Sleep(500 * time.Millisecond)
	}
	fmt.Printf("go-spiffe: %d updates, %d expired, %d handshakes, %d failed, %d times out of date, %d of them with a server\n",
		updates.Load(), expired.Load(), handshakes.Load(), failed.Load(), stale.Load(), staleWithServer.Load())
	if expired.Load()+failed.Load()+staleWithServer.Load() > 0 || handshakes.Load() < 100 || updates.Load() < 10 {
		os.Exit(1)
	}
}
