// A watch by go-spiffe's first version, whose dialer puts the socket's path into :authority.
//
//	go run ./first SOCKET
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/workload"
)

type watcher chan error

func (w watcher) UpdateX509SVIDs(svids *workload.X509SVIDs) {
	if got := svids.Default().SPIFFEID; got != "spiffe://example.org/myservice" {
		w <- fmt.Errorf("got %s", got)
		return
	}
	w <- nil
}

func (w watcher) OnError(err error) { w <- err }

func first(socket string) error {
	answers := make(watcher, 16)
	client, err := workload.NewX509SVIDClient(answers, workload.WithAddr("unix://"+socket))
	if err != nil {
		return err
	}
	if err := client.Start(); err != nil {
		return err
	}
	defer client.Stop() //nolint:errcheck // it only says that it was not started
	select {
	case err := <-answers:
		return err
	case <-time.After(20 * time.Second):
		return fmt.Errorf("nothing came")
	}
}

func main() {
	if err := first(os.Args[1]); err != nil {
		fmt.Printf("FAILED: go-spiffe, version 1: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("go: go-spiffe, version 1")
}
